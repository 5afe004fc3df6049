# read by CMake after ggml's project(), see windows.py: GCC aligns stacks to 16 bytes on Windows, but spills 32 with
# instructions that want 32 (its bug 54412); the assembler takes those that do not
add_compile_options(-Wa,-muse-unaligned-vector-move)
