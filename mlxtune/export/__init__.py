"""What a result takes along when it leaves this machine, one file per target: so far its model card."""
