"""What every room stands on: errors, safe reading and writing, signatures of networks, and things that run.

The only part of the toolchain that passes, targets, validation and reports import. It loads no torch.
"""
