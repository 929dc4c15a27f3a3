"""Tasks with an answer: what is asked, what is right, how it is scored. `thrift_lab.eval.tasks.table` lists them."""
