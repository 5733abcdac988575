"""Training through the language model: the loss is what patching the reconstructions in does to its predictions.

    KL = (1/|S|) Σ_{t∈S} Σ_v p (log p − log q)        p clean, q patched next-token distribution
    CE = (1/|S|) Σ_{t∈S} −log q(x_{t+1})
    loss = KL or CE  +  Σ over dictionaries of  α·AuxK + penalties + β·FVU

S and the patched positions P are evaluation's (cache/patching.py). The dictionaries of a group (one per layer, say) are
trained together, in one of three modes, each the training form of the protocol of the same name:

- `cascade`: one pass; every encoder reads the stream as the earlier replacements left it, and the gradient of a later
  dictionary's input reaches the earlier dictionaries;
- `clean_input`: encoders read clean activations, one pass with all sites written at once;
- `single_site`: the same codes, one pass per written site with that site alone, the loss summed over sites.

The model's own parameters get no gradient: the target is frozen, and autograd starts at the first edit.

`admission.py` what is refused; `contexts.py` which contexts a step takes; `scores.py` KL and CE; `clean.py` clean rows,
from the model or the cache;
`members.py` a dictionary in the pass; `group.py` the step; `feed.py` the loop.

Left out: a clean pass shared by the groups of a sweep; gradient checkpointing within the model (`train.micro_rows`
bounds what is kept).
"""
