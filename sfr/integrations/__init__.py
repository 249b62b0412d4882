"""A few lines for each training framework; nothing here is loaded before it is imported by name.

``sfr.integrations.transformers`` and ``sfr.integrations.lightning`` have a callback that logs the parts of the loss and
keeps the criterion's state in checkpoints, ``sfr.integrations.timm`` a training task that does.
"""
