"""What a training run will cost before it runs: devices, layouts, a cost model, and the search for the best.

Plain arithmetic, without torch, so that ``xverse plan`` answers at once.
"""
