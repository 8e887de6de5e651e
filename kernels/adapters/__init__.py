"""Adapters: an engine's own compressor calls, made with kvfold's public ops.

One module per engine, imported by its name, as `import kvfold.adapters.trtllm`. No engine is a
dependency of kvfold. docs/engines.md says what each adapter covers.
"""
