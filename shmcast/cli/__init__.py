"""The console scripts: they parse, ask the module that thinks, and print."""
