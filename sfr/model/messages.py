"""Messages of the errors that features raise when they cannot be used."""

NO_FEATURES = (
    "no features are recorded. A criterion belongs to the model it was made for: for another one, or a copy, make a "
    "new SFRLoss. It needs a forward of the wrapped model (called as model(x), not model.forward(x), and not "
    "unwrapped) in training mode and with gradient just before it, and is not called inside that forward. Of several "
    "criteria for one model each needs a forward of its own. It may be called again, as for the two labels of MixUp, "
    "only with the very same logits and before the next forward, never after a call that failed. Other outputs of that "
    "forward, as of auxiliary classifiers, get a plain loss, F.cross_entropy(auxiliary, target); or one label_loss= "
    "takes all outputs. For a validation loss call criterion.eval(), or compute it under torch.no_grad()."
)
JOINED = (
    "with model.join(), a rank that has run out of batches takes no part in what the criterion exchanges between the "
    "ranks (label statistics, past predictions), and the others would wait for it or fail. Give all "
    "ranks the same number of batches (DistributedSampler, Accelerate's loaders), or set smoothing='uniform' or 'none' "
    "for the criterion"
)
OTHER_SETTINGS = (
    "the model has been wrapped again, with other settings than those this criterion was made with: make a new one, "
    "criterion = sfr.SFRLoss(model)"
)
TRANSFORMED = (
    "the feature term cannot be computed inside a transform of torch.func (grad, vmap, jacrev, ...): the transport is "
    "solved on the values, which the transform hides. Take loss.backward(), or torch.autograd.grad(loss, ...), which "
    "also knows create_graph=True; and inside the transform a plain loss, such as F.cross_entropy"
)
