"""From stored images to batches. Order and crops are pure functions (`order`, `geometry`, `planned`); the torch, DALI
and FFCV loaders turn them into pixels, and `prefetch` keeps batches ready.
"""
