"""`POST /v1/responses`: OpenAI's Responses API, without anything that would have to be stored."""
