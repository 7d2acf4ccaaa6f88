"""Strategies that sum gradients: `comm.reduction` names the file. Begin with `naive`."""
