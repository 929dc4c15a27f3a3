"""How others attend: one file an idea, from its paper, in plain PyTorch; `thrift_lab.eval.rivals.rival_table` lists them."""
