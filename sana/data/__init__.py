"""Shards, orders, captions, the embedded scenes world, and the LightningDataModules over them."""
