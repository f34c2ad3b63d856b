"""What visitors of a published model see: its card, with what is known of the run behind it and nothing that is not."""
