"""One readable file an example; README.md says what each shows. What several of them share is in common/."""
