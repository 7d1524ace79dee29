"""Print one answer as it comes: `.venv/bin/python examples/stream.py`."""

from minserve import Engine, SamplingParams

if __name__ == "__main__":
    engine = Engine("smollm2")
    messages = [{"role": "user", "content": "Explain in two sentences why the sky is blue."}]
    params = SamplingParams(temperature=0.7, top_p=0.9, seed=1, max_tokens=80)
    for delta in engine.stream(messages, params):
        print(delta.text, end="", flush=True)
    print()
