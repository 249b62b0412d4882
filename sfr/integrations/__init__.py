"""Callbacks and tasks for training frameworks; each module is loaded only if it is imported by name.

``sfr.integrations.transformers`` and ``sfr.integrations.lightning`` have a callback that logs the parts of the loss and
keeps the criterion's state in checkpoints; ``sfr.integrations.timm`` has a training task that does both.
"""
