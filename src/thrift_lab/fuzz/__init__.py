"""A stateful fuzz of the paged cache: random operations, interrupts and wrong arguments beside a model of what it holds."""
