"""Run many prompts together and wait for all of them: `.venv/bin/python examples/generate.py`."""

from minserve import Engine, SamplingParams

if __name__ == "__main__":
    engine = Engine("smollm2")
    prompts = [
        [{"role": "user", "content": "What is the capital of France?"}],
        [{"role": "user", "content": "Name three colours."}],
        "Once upon a time",  # a plain text is continued, without the chat template
    ]
    params = SamplingParams(temperature=0.0, max_tokens=48)
    for result in engine.generate(prompts, params, progress=True):
        print(f"{result.outputs[0].finish_reason:>7}: {result.outputs[0].text.strip()!r}")
