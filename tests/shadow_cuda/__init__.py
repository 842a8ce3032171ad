"""The library's own code on two T4s that are not there.

`t4` makes a CPU build of torch believe that there are two cards (it must be imported before torch), `tensors` has tensors that say
`cuda:i`, hold data on the CPU and compute for real, so that everything that depends on data works. Mixing devices raises, as it
would; kernels, copies, synchronisations and attention calls are counted. `cases` runs trainings and predictions on them.

What this cannot show: real kernels and their speed, NCCL, Triton, real memory.
"""
