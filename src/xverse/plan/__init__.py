"""The cost and memory of training runs before they start: devices, layouts, a cost model, memory models and
the search for the best layout. Plain arithmetic without torch, so that ``xverse plan`` starts fast.
"""
