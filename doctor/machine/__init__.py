"""The small model of the machine and the network: numbers from arithmetic, not from adjectives.

`card` is one GPU, `weights` a model's bytes, `fabric` an all-reduce, `step` the time of a token and of a prompt,
`fit` what fits and what can't be split. Bytes are exact but for the runtime's; times are right within about a third
for an engine that runs as it should (`docs/arithmetic.md` shows against what): a rule that compares a measurement
with a prediction leaves a factor of two between them.
"""
