"""What other libraries need to train with `sparse_optim`; each module imports the library that it is named
after.
"""
