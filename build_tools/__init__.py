"""How effkernels is built: the PEP 517 backend, and the compiler runs behind it.

backend.py   what pip calls; decides whether the build needs torch installed
command.py   the setuptools commands
native.py    compiles csrc/ into effkernels/_cpu.so and _cuda.so and records what was built
locate.py    finds torch, the C++ compiler and nvcc, without importing torch

`python -m build_tools` builds the kernels in place: only what changed, without pip or network.
"""
