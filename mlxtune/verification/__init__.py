"""What a run states, held against what its files, and its models, give. Knows run folders; writes nothing."""
