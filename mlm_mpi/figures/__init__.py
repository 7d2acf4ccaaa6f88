"""How good a model is, in numbers: from outcomes, one by one, never from means of means."""
