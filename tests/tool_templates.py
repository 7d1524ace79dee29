"""Chat templates in the manner of several families, for tests of tools and thinking.

They are short, but write tools, calls, results and thinking as the families' own templates do.
"""

from __future__ import annotations

_HEAD = "{%- macro head(role) -%}{{ '<|im_start|>' + role + '\\n' }}{%- endmacro -%}"
_TOOLS = (
    "{%- if tools %}{{ head('system') }}<tools>"
    "{%- for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}{{ '\\n</tools><|im_end|>\\n' }}"
    "{%- endif %}"
)
_PROMPT = "{%- if add_generation_prompt %}{{ head('assistant') }}{% endif %}"

# Qwen's and Hermes': objects between marks, results as a user's message.
HERMES = (
    _HEAD
    + _TOOLS
    + """\
{%- for message in messages %}
  {%- if message.role == 'tool' %}
    {{- head('user') + '<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
  {%- else %}
    {{- head(message.role) + message.content }}
    {%- for call in message.tool_calls or [] %}
      {%- if not loop.first or message.content %}{{ '\\n' }}{% endif %}
      {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
      {{- call.function.arguments | tojson }}
      {{- '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
  {%- endif %}
{%- endfor %}"""
    + _PROMPT
)

# Qwen3's: the same, and the model thinks unless it is told not to.
HYBRID = (
    HERMES.replace(
        "{{- head(message.role) + message.content }}",
        "{{- head(message.role) + message.content.split('</think>')[-1].lstrip('\\n') }}",
    )
    + """\
{%- if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}
  {{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}"""
)

# DeepSeek-R1's: the prompt ends within the thinking; arguments are a text; no tools are described.
ALWAYS_THINKING = (
    _HEAD
    + """\
{%- for message in messages %}
  {{- head(message.role) + message.content.split('</think>')[-1] }}
  {%- for call in message.tool_calls or [] %}
    {{- '<call>' + call.function.name + '\\n```json\\n' + call.function.arguments + '\\n```' }}
  {%- endfor %}
  {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ head('assistant') + '<think>\\n' }}{% endif %}"""
)

# Llama 3's: one object, and "parameters".
LLAMA3 = """\
{%- for message in messages %}
  {%- if message.tool_calls %}
    {%- if message.tool_calls | length != 1 %}{{ raise_exception('one call alone') }}{% endif %}
    {%- set call = message.tool_calls[0].function %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
    {{- '{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}{{ '}<|eot_id|>' }}
  {%- else %}
    {%- set role = 'ipython' if message.role == 'tool' else message.role %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
    {%- if tools and loop.first %}
      {{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.\\n' }}
      {%- for tool in tools %}{{ tool | tojson(indent=4) }}{{ '\\n\\n' }}{% endfor %}
    {%- endif %}
    {{- message.content + '<|eot_id|>' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

_MISTRAL = """\
{%- for message in messages %}
  {%- if message.role == 'tool' %}
    {{- '[TOOL_RESULTS] ' + message.content + '[/TOOL_RESULTS]' }}
  {%- elif message.tool_calls %}
    %CALLS%
    {{- '</s>' }}
  {%- elif message.role == 'assistant' %}
    {{- ' ' + message.content + '</s>' }}
  {%- else %}
    {%- if tools and loop.last %}{{ '[AVAILABLE_TOOLS] ' }}{{ tools | tojson }}{{ '[/AVAILABLE_TOOLS]' }}{% endif %}
    {{- '[INST] ' + message.content + '[/INST]' }}
  {%- endif %}
{%- endfor %}"""
_CHECKED = """\
{%- for call in message.tool_calls %}
      {%- if call.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}
    {%- endfor %}"""

# Mistral's older form: a list of objects.
MISTRAL_LIST = _MISTRAL.replace(
    "%CALLS%",
    _CHECKED
    + """\
{{- '[TOOL_CALLS] [' }}
    {%- for call in message.tool_calls %}
      {%- set text = call.function | tojson %}
      {{- text[:-1] + ', "id": "' + call.id + '"}' }}{{ ', ' if not loop.last else ']' }}
    {%- endfor %}""",
)
# Its newer form: names before their arguments.
MISTRAL_ARGS = _MISTRAL.replace(
    "%CALLS%",
    _CHECKED
    + """\
{%- for call in message.tool_calls %}
      {{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' }}{{ call.function.arguments | tojson }}
    {%- endfor %}""",
)

# Gemma's: no system message, and nothing of tools.
NO_SYSTEM = (
    _HEAD
    + """\
{%- for message in messages %}
  {%- if message.role == 'system' %}{{ raise_exception('no system message') }}{% endif %}
  {{- head(message.role) + message.content + '<|im_end|>\\n' }}
{%- endfor %}"""
    + _PROMPT
)

BY_NAME = {
    "hermes": HERMES,
    "hybrid": HYBRID,
    "always-thinking": ALWAYS_THINKING,
    "llama3": LLAMA3,
    "mistral-list": MISTRAL_LIST,
    "mistral-args": MISTRAL_ARGS,
    "no-system": NO_SYSTEM,
}
