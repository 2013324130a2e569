"""Matrix products and element-wise steps that the model, the adapters and the losses share."""
