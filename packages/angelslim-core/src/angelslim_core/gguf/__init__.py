"""GGUF files for llama.cpp: names, blocks and metadata. The file format itself is the gguf library's."""
