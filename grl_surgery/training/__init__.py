"""What a training loop needs: losses, schedules of the coefficient, metrics."""
