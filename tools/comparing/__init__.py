"""What a comparison of training methods consists of: arms, runs that take turns, equal training time, statistics."""
