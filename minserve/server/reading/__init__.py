"""Reading request bodies, from bytes to checked calls with token ids, beside the event loop."""
