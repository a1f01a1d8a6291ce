"""Documents about a model, written from records that exist: what is not recorded stands there as TODO."""
