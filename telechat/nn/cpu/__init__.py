"""Operators of our own for CPUs, in C++: `build` compiles them, the other files call them."""
