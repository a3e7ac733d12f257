"""SANA Lab: one trainer for the SANA family of efficient image and video generators.

Packages are organised by mathematical role. Layers, from top to bottom (a layer imports only those below it):

    model, callback
    data, encoder, network, objective, sampler, optimizer, metric, quant, strategy, checkpoint, run
    nn, flow
    ops
    types

Packages of one row do not import each other; `model` and the entry points join them.
"""

__version__ = "0.1.0"
