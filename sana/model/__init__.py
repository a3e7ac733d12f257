"""LightningModules: thin glue that joins the parts of one shape of training step."""
