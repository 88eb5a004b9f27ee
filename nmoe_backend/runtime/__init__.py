"""The device side of a rank: worker, slots and batches, KV cache, sampler, weights. Never imports the control plane."""
