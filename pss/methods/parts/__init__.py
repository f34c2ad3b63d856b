"""What methods are made of, one file for each kind of part: attention modules, losses, rules and masks. None of them
knows a method."""
