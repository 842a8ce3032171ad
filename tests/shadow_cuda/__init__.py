"""The library's own code on two T4s that are not there.

`t4` makes a CPU build of torch believe that there are two cards (it must be imported before torch). `tensors` has
tensors that say `cuda:i`, hold data on the CPU and compute for real, so that everything that depends on data works;
mixing devices raises, as it would. `counts` says what ran: kernels, copies, waits of the host, calls of attention,
which `attention` does as a T4's kernels. `cases` runs trainings and predictions on them, `tests/test_shadow.py` judges.

What this cannot show: real kernels and their speed, NCCL, Triton, real memory.
"""
