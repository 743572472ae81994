"""Public functions: validation, custom op, fake and autograd, once per op for every backend."""
