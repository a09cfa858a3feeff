"""The parts of `versus_nnunet.py`: one module per kind of row, and what they share."""
