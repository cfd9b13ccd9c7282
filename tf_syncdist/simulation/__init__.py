"""What a cutoff would give: thousands of workers on one core, under the code that a job runs."""
