"""Looking inside a trained model: what of a text it attends to, what its layers would say, what its answer rests on."""
