"""One table of all parameters that requests may hold: the parser, /openapi.json and a page use it."""
