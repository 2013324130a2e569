"""Matrix products and element-wise steps that models, adapters and losses share, and the ranks that they run on."""
