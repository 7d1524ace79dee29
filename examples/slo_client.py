"""Ask a running server (`make serve`) to keep a latency promise, and see whether it did.

It needs the official client: `.venv/bin/pip install openai`.

.venv/bin/python examples/slo_client.py
"""

from openai import OpenAI

if __name__ == "__main__":
    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    stream = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "Name three colours."}],
        max_tokens=64,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        # A class by name, or objectives: {"ttft_ms": 800, "tpot_ms": 100}. With
        # "on_unattainable": "reject" the server answers 429 rather than late.
        extra_body={"slo": "chatbot"},
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        else:
            print(f"\n{chunk.usage.slo}")
