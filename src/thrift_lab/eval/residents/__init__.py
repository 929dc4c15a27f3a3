"""Which blocks of a cache should keep their plane of high precision: rules, emulated inside a model."""
