"""How a run is spread over devices: Lightning strategies, what they shard, and the processes they start."""
