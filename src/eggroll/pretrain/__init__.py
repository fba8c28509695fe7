"""Integer language-model pretraining: a recurrent model that lives in int8 (EGGROLL section 6.1, appendices G to I).

Weights, activations and hidden state are int8; there is no floating point and no backpropagation. ``oracle`` is the
arithmetic in NumPy, ``engine`` the same function, bit for bit, as fast as the machine's integer units allow.
"""
