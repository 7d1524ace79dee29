"""What a `Structure` means for tokens: grammars, and a guide for each output. No torch here."""
