"""What tuning starts from."""
