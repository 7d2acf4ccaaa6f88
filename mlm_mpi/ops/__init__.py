"""The mathematics: forward() and backward() on arrays, float64-safe, serial. Never sees a communicator."""
